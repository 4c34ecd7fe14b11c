"""Where totals rest. Imports nothing else of catchall."""
