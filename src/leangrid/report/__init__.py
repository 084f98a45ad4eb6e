"""What a run did, for people: one record for each layer, tables for the terminal, the model card, the report page."""
