"""What people type: the arkvale command."""
