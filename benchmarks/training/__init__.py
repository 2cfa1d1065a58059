"""Training runs side by side, resumable after a kill at any step, with logs in JSON lines."""
