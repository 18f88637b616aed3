"""State that is read and written back: what is kept, what starts again, what is cut."""
