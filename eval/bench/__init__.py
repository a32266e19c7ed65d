"""``vicinal bench``: time and memory of operators, models and training, and what the tables of the docs are made of."""
