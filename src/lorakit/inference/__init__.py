"""Answers from what was trained: a folder, a base that many adapters share, files of any size."""
