"""Scores of reasoning: by a model behind an endpoint, or by a program where every step can be checked exactly."""
