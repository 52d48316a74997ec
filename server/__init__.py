"""gRPC service, client, command line, text."""
