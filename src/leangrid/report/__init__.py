"""What a run did, for people: one record a layer, tables for the terminal, the model card."""
