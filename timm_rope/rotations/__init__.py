"""How a group of channels turns."""
