"""The demo model: sounds made by formula, and the ten probes that were trained on them."""
