"""One module per method; a method's name is its module's name. Nothing is registered: `name: migu` imports `migu`."""
