"""Makes tutorial.sqlite3 with the real Django (3.2): python3 make.py

The models are those of the tutorials 000 and 003, and some that others have.
"""
import os
from datetime import datetime, timedelta, timezone

import django
from django.conf import settings

os.chdir(os.path.dirname(os.path.abspath(__file__)))
FILE = "tutorial.sqlite3"
if os.path.exists(FILE):
    os.remove(FILE)
settings.configure(
    USE_TZ=True,
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": FILE}},
)
django.setup()

from django.contrib.auth.hashers import MD5PasswordHasher, PBKDF2PasswordHasher
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connection, models


class ChatMessage(models.Model):  # tutorial 000
    username = models.CharField(max_length=100)
    room = models.CharField(max_length=100)
    content = models.TextField()
    create_time = models.DateTimeField()  # theirs is auto_now_add

    class Meta:
        app_label = "chat"


class Message(models.Model):  # tutorial 003
    user = models.ForeignKey(User, on_delete=models.CASCADE)
    content = models.TextField()
    timestamp = models.DateTimeField()

    class Meta:
        app_label = "talk"


class Room(models.Model):
    name = models.CharField(max_length=255, unique=True)

    class Meta:
        app_label = "forum"


class ForumMessage(models.Model):
    room = models.ForeignKey(Room, on_delete=models.CASCADE)
    author = models.ForeignKey(User, null=True, on_delete=models.SET_NULL)
    body = models.TextField()
    created_at = models.DateTimeField(null=True)

    class Meta:
        app_label = "forum"
        db_table = "forum_message"


class Direct(models.Model):  # which nobody else may read
    sender = models.ForeignKey(User, related_name="+", on_delete=models.CASCADE)
    recipient = models.ForeignKey(User, related_name="+", on_delete=models.CASCADE)
    text = models.TextField()
    created = models.DateTimeField()

    class Meta:
        app_label = "dm"
        db_table = "dm_message"


class Flash(models.Model):  # of another kind
    level = models.IntegerField()
    tags = models.TextField()

    class Meta:
        app_label = "flash"
        db_table = "flash_message"


call_command("migrate", verbosity=0)
with connection.schema_editor() as editor:
    for model in (ChatMessage, Message, Room, ForumMessage, Direct, Flash):
        editor.create_model(model)

start = datetime(2024, 2, 29, 15, 59, 59, 123456, timezone.utc)


def at(minutes):
    return start + timedelta(minutes=minutes)


def user(name, password="", **more):
    return User.objects.create(username=name, password=password, date_joined=start, **more)


pbkdf2 = PBKDF2PasswordHasher()
full = pbkdf2.encode("open sesame", "EdDfZ2jMeVFVZfVg")  # 260,000 iterations
pbkdf2.iterations = 1000


def quick(password):
    return pbkdf2.encode(password, pbkdf2.salt())


admin = user("admin", quick("admin's own"), is_superuser=True, is_staff=True)
hong = user("小红", full)
bob = user("bob", quick("bob's own"), is_active=False)
user("ann@example.org", quick("ann's own"))
user("Carol", quick("Carol's own"))
carol = user("carol", quick("carol's own"))
user("old", MD5PasswordHasher().encode("old's own", "salt"))
user("gone", "!unusable")
user("游客", quick("a guest's own"))
user("+++", quick("plus plus plus"))
user("l" * 150, quick("a long one's own"))
user("boss", "!unusable", is_superuser=True)

said = [
    ("小红", "大厅", "你好，世界"),
    ("bob", "大厅", "<script>alert(1)</script>"),
    ("游客", "大厅", "谁在？"),
    ("visitor 7", "大厅", "no account"),
    ("ann@example.org", "room/one", "mapped twice"),
    ("🙂", "room_one", "smile"),
    ("", "", "nobody, nowhere"),
    ("小红", "大厅", ""),
    ("小红", "大厅", " \n "),
    ("小红", "Lobby", "长" * 6000),
    ("u" * 5000, "r" * 100, "long names"),
    ("Carol", "大厅", "upper"),
    ("carol", "大厅", "lower"),
]
for i, (name, room, text) in enumerate(said):
    ChatMessage.objects.create(username=name, room=room, content=text, create_time=at(i))
for i in range(5):
    Message.objects.create(user=(hong, carol)[i % 2], content=f"talk {i}", timestamp=at(100 + i).replace(microsecond=0))
tea = Room.objects.create(name="茶水间")
ForumMessage.objects.create(room=tea, author=admin, body="tea is ready", created_at=at(200))
ForumMessage.objects.create(room=tea, author=None, body="by one who left", created_at=None)
Direct.objects.create(sender=hong, recipient=bob, text="between us", created=at(300))
Flash.objects.create(level=1, tags="x")

with connection.cursor() as cursor:
    for table in ("auth_permission", "django_content_type", "django_migrations"):
        cursor.execute(f"DELETE FROM {table}")
connection.close()
with connection.cursor() as cursor:
    cursor.execute("VACUUM")
