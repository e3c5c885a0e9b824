"""Training: what a run prepares, its loop, and what it leaves."""
