"""What a traced function keeps and takes; nothing is compiled."""
