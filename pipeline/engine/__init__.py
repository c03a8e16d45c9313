"""What stages and server need from a served model, and who keeps it alive."""
