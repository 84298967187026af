"""Turn rows with categories, dates and missing values into numbers by a declared schema that is fitted online."""
