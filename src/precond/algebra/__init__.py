"""Vectors, linear maps on them, coordinates, schedules: what the library computes with. It knows tensors only."""
