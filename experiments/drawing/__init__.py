"""Pictures of schedules: a plan's timeline, as text and as a figure. No JAX import."""
