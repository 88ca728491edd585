"""The processes that speak to clients: each module terminates one protocol of the gateway."""
