"""The report of a run for people: one HTML file that stands alone."""
