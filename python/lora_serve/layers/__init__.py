"""Building blocks of the decoder models, with their adapter seams."""
