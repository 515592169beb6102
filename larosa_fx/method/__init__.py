"""The method: calibration, thresholds, evaluation, and the reference in plain words."""
