"""Reads calibration and evaluation text, tokenizes it and cuts it into windows of token ids."""
