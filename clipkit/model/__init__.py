"""clipkit/model"""
