"""What a run, or several, are reported as: a self-contained page, Markdown for a model card, and pictures.

`words.py` says what happened, `heatmaps.py`, `curves.py` and `stability.py` draw it, `answers.py` chooses what to look
at; `page.py` puts a page together, `sweep.py` that of a sweep.
"""
