"""What `downstream.py` is made of: scenes, folders, a detector, a segmenter, how both are tested, tables and a plot."""
