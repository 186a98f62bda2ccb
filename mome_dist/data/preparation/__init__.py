"""From film of talking faces to a corpus: finding the mouth, cropping it, cutting long clips, writing shards."""
