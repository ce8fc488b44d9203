"""Chips to compile for, present or absent: their figures, links and names."""
