"""Scores and their intervals: numpy alone."""
