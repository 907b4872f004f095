"""What the pages in a browser are made of: their files, and recordings as WAV that a browser reads in stretches."""
