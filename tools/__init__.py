"""Programs that people run. Nothing imports them."""
