"""What a model is trained and scored for, one file each."""
