"""Timing, memory and floors of the steps that train and stream, and the pages that report them."""
