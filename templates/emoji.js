// The emoji that have names here, in the order of the picker. Any other one can be typed or pasted.

const table = `
👍 thumbsup 赞 好|❤️ heart 爱心 红心|😂 joy 笑哭|🎉 tada party 庆祝|👀 eyes 看看|🙏 pray thanks 谢谢 拜托|👎 thumbsdown 踩|✅ check done 完成
😀 grinning 笑|😄 smile 开心|😅 sweat_smile 汗|😊 blush 微笑|😉 wink 眨眼|😍 heart_eyes 喜欢|😘 kiss 亲亲|🤔 thinking 思考|😐 neutral 面无表情
🙄 eye_roll 白眼|😏 smirk 坏笑|😢 cry 哭|😭 sob 大哭|😡 angry 生气|😱 scream 惊恐|😴 sleeping 睡觉|🤒 sick 生病|😎 cool 酷|🥳 partying 派对
🤯 mind_blown 震惊|😇 innocent 天使|🤗 hug 抱抱|🤣 rofl 笑死|🥲 bittersweet 含泪|🫡 salute 收到 敬礼|👋 wave 你好 再见|👌 ok 没问题|✌️ victory 耶
👏 clap 鼓掌|🙌 raised_hands 万岁|🤝 handshake 合作 握手|💪 muscle 加油|🤞 fingers_crossed 祈祷|👉 point_right 右|👈 point_left 左|👆 point_up 上
🔥 fire 火|⭐ star 星|✨ sparkles 闪亮|💯 100 满分|❗ exclamation 感叹|❓ question 问号|❌ x 错|⚠️ warning 警告|🚨 alarm 警报|💡 idea 想法|📌 pin 置顶
🔒 lock 锁|🔑 key 钥匙|🔍 search 搜索|🔧 wrench 修理|🐛 bug 虫子|🚀 rocket 发布 火箭|🚧 construction 施工|📦 package 包|📝 memo 笔记|📅 calendar 日历
⏰ alarm_clock 闹钟|⏳ hourglass 等待|💬 speech 聊天|📣 loudspeaker 通知|📈 chart_up 上涨|📉 chart_down 下跌|💰 money 钱|🎁 gift 礼物 红包|🏆 trophy 冠军
☕ coffee 咖啡|🍵 tea 茶|🍺 beer 啤酒|🍻 cheers 干杯|🍜 noodles 面条|🍚 rice 米饭|🥟 dumpling 饺子|🍰 cake 蛋糕|🍎 apple 苹果|🌹 rose 玫瑰|🌞 sun 太阳
🌧️ rain 雨|❄️ snow 雪|🌈 rainbow 彩虹|🐱 cat 猫|🐶 dog 狗|🐼 panda 熊猫|🐉 dragon 龙|🏠 home 家|🚗 car 车|✈️ plane 飞机|🚄 train 高铁|💻 laptop 电脑|📱 phone 手机`;

// [{emoji, names}]: the first name is the one shown.
export const emojis = table.trim().split(/[\n|]/).map(entry => {
  const [emoji, ...names] = entry.split(" ");
  return { emoji, names };
});

// Those offered without the picker.
export const quickEmojis = emojis.slice(0, 5).map(e => e.emoji);
