"""What a run keeps and shows: its folder, state and records, the terminal, its processes and their signals."""
