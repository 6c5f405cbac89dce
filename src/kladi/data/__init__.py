"""What we read: manifest row -> pixels -> views."""
