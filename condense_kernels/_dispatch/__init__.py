"""How an operator reaches torch: its schema and library, backends, derivatives, vmap, shards, checks of values."""
