"""Weights to and from the formats of other GPT-2 programs."""
