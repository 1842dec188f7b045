"""What reinforcement tuning needs beside TRL: references, rewards, rollouts, and which samples are worth them."""
