"""How good a ranking is: metrics, tables, plots, answers."""
