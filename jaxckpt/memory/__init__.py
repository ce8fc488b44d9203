"""What users call on a step or a block: `measure`, `explain`, and findings on their plans."""
