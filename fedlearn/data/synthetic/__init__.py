"""Seeded generators of made-up data. Nothing here was measured on a person; every name and card says synthetic."""
