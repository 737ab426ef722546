"""The base model that ships with the program, its examples, and a score for its images."""
