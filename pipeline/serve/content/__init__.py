"""What was asked and answered, word by word, of the keys that are to have it kept."""
