"""What the stages share. Nothing here imports a file of the repository's root."""
