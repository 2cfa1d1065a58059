"""The demonstration behind `python -m metaopt demo`: handwritten digits with NumPy alone."""
