"""Find where the task changes in a stream without boundaries."""
