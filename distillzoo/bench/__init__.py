"""The harness: recipes, plans, runs, records, and the tables made from them."""
