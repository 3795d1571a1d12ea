"""What a run reports: the record, the model card, its pictures."""
