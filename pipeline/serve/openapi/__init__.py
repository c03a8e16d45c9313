"""The API's own description: a document for programs, made from the routes and their models."""
