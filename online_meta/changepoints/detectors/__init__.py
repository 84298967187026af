"""Ways to find where the tasks of an unsegmented stream of samples change, one a file."""
