"""``vicinal detect`` and ``vicinal segment`` beyond training: measures and pictures."""
