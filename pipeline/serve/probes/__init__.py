"""What a router would find out about a server before it sent anybody there."""
