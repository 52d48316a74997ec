"""The wire contract, pallasite.v1, and the code generated from it."""
